// The empty page: the zone for a photo, and the examples, which are sent at once.
for (const picture of element.querySelectorAll("[data-file]")) {
  picture.src = `${window.gradio_config.root}/gradio_api/file=${picture.dataset.file}`;
}
element.addEventListener("click", (event) => {
  const card = event.target.closest(".card");
  if (card) {
    minigpt4.sending(true);
    trigger("select", { index: Number(card.dataset.index), value: "" });
  } else if (event.target.closest(".take")) minigpt4.camera();
  else if (event.target.closest(".drop")) minigpt4.choose();
});
