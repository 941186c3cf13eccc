"""New versions: put into the watched folder, loaded beside the old, switched to."""
