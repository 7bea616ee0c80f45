"""One HTML page about several runs, from what was read of them.  It needs no network and holds no scripts."""
