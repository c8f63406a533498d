"""The server: the chat page (Gradio), the HTTP API, and the limits on what both accept."""
