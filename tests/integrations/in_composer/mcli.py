"""Stands in for MosaicML's command line, which Composer imports for its logger, and no test uses."""
