"""One pass over the queries: clean references from a cache, finished work kept, the strongest attack of several."""
