"""OmniGen2: transformer, pipeline, and the reader and writer of the released layout."""
