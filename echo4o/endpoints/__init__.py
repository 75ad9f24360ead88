"""Calls to paid or remote models: limits and retries, one budget, kept answers, chat and image endpoints.

A model is an [`Endpoint`](endpoint.py): it answers one request. A [`Caller`](calls.py) sends requests to it within the
limits of [`limits`](limits.py), repeats what can be repeated, keeps every answer in an [`AnswerCache`](cache.py) and
counts its cost in a [`Ledger`](budget.py). Judges and `echo4o dataset synthesize` are built on this room.
"""
