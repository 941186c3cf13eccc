"""What one call of `embed` has done so far and has left out, in this process or over HTTP."""
