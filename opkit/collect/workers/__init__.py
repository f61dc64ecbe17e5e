"""Who does the work: the pool, its lanes, the worker process, rows on disk, Ray. Times nothing."""
