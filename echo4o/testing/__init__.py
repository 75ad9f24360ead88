"""Servers for tests on 127.0.0.1: an OpenAI-compatible endpoint and a Hugging Face Hub, with faults on request.

[`openai_server`](openai_server.py) answers chat, image and model requests, to test judges, endpoints and synthesis
recipes. [`hub`](hub.py) stores repositories, to test uploads and downloads. [`processes`](processes.py) runs a script in
a process that uses only these servers. See docs/testing.md.
"""
