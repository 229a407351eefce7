"""torch.distributed.checkpoint with checksums and without pickle."""
