"""HTTP as the clients of OpenAI's API speak it."""
