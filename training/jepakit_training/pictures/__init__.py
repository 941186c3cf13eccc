"""Pictures to look at: the contact sheet of `inspect`, and a run's nearest neighbours."""
