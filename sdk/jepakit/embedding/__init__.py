"""What `embed` keeps track of, in this process or over HTTP: the results so far, and the images left out."""
