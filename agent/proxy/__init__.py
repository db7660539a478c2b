"""The byte path: one process, one epoll loop. Reading order: worker, listener, source, pool, link, destination, relay."""
