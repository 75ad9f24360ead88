"""Cards of everything that is published: templates (`*.md.j2`), what fills them, and the schema they are held to.

A card is YAML for the Hub and text for people. The text that is written here stands between two marks; `merged` keeps
what a person wrote around it. Nothing is made up: what no file says is left out.
"""
