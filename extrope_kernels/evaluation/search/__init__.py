"""The search for what lets one model read one length: published methods, factors, windows."""

from .run import search as search
