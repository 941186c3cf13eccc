"""What every `embed` returns and keeps, in process and over HTTP."""
