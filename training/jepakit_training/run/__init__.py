"""What a run keeps on disk: its folder, checkpoints, records and bundles."""
