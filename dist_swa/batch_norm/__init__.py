"""BatchNorm statistics over all ranks."""
