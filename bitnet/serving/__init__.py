"""A model behind a URL: OpenAI's HTTP interface over rows of texts that share one model."""
