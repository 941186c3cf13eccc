"""LeJEPA: the loss, the model, what trains, and one step of it."""
