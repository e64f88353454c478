"""`ramet serve`: delegation behind the endpoints of OpenAI's protocol."""
