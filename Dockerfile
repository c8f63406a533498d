# The chat page with the embedded model. Weights are fetched while the image is built.
FROM python:3.11-slim-bookworm
RUN useradd --create-home --uid 1000 app
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY --chown=app . .
USER app
ENV MINIGPT4_WEIGHTS=/home/app/weights MINIGPT4_HOST=0.0.0.0
RUN python -m minigpt4 download nano
EXPOSE 7860
CMD ["python", "app.py"]
