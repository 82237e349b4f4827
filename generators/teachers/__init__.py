"""Clients of models: each turns a call into one request and its response into a reply."""
