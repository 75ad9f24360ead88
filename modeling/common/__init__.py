"""What the pipelines of every model family share. Files here are published beside each pipeline that lists them."""
