"""Publishing: `echo4o push`, `Echo4oPipeline.push_to_hub` and `echo4o dataset publish` are all `echo4o.hub.push.push`."""
