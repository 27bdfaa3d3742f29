"""Search the method by which a model reads a length best: published ones, factors, windows."""

from .run import search as search
