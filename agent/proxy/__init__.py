"""The byte path: one epoll loop. Reading order: worker, listener, source, pool, link, destination, relay."""
