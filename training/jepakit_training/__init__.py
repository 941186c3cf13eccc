"""Adapts a timm backbone to a user's own images with LeJEPA, and says whether it helped.

To read it, in the order of a run:

    launch      which processes train: this one, several, or those of a Ray cluster (ray_launch)
    loop        what each of them does: measure, train, measure again
    setup       from settings and images to what a run is made of
    plan        what is left to the data and the backbone: sizes, steps, rates, held-out images (holdout)
    data        from files to batches of views
    learning    one step (learner) of what trains (trainable, twin): views to features to projections (model), and the loss (sigreg)
    measuring   which pooling serves, and the verdict's measurements
    run         what is kept on disk: folder, checkpoints, bundles
    pictures    what is drawn for people

The other modules serve these; the first line of each says how.
"""

from jepakit_training.launch import adapt

__all__ = ["adapt"]
