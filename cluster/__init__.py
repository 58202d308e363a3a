"""Runs commands on clusters. It sends command lines and imports neither actcache nor sae."""
