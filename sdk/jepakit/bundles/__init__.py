"""The bundle: a backbone, how to feed it, and the means to verify it, in one immutable folder."""
