"""From the user's images to batches of views: what their values mean, what may be wrong with them, how they are read."""
