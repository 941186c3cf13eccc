"""Adapts a timm backbone to a user's own images with LeJEPA, and says whether it helped.

To read it, in the order of a run:

    launch       which processes train: this one, several, or those of a Ray cluster (ray_launch)
    loop         what each of them does: measure, train, measure again, with checkpoints (checkpoint) and bundles (run_bundles)
    setup        from settings and images to what a run is made of
    plan         what is left to the data and the backbone: sizes, steps, rates, held-out images (holdout)
    data, views  from files to batches of views, and their colours (photometric)
    learner      one step; what of the backbone trains (trainable), and the twin that trains in its place (twin)
    model        views to features to projections
    sigreg       the loss
    evaluation   which pooling serves, and the verdict's measurements

The other modules serve these; the first line of each says how.
"""

from jepakit_training.launch import adapt

__all__ = ["adapt"]
