"""The HTTP API for programs: OpenAI's endpoints, health, metrics, and /chat for gradio_client."""
