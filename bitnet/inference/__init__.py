"""Running a model: engines for CPU and GPU, generation, sampling."""
