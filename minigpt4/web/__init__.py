"""The chat page, in Gradio; nothing else imports it."""
