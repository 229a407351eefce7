"""Stand-in for MosaicML's command line, which Composer imports and no test uses."""
