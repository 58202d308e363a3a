"""Submits runs to a Ray cluster. It sends command lines and imports neither actcache nor sae."""
