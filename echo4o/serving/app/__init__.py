"""The page for people: a gradio app on the same engine as the API."""
