"""Stages that make samples, and the clients of the models that they ask."""
