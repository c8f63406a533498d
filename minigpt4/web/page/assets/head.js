// The menu that downloads the conversation.
element.addEventListener("click", (event) => {
  const value = event.target.closest("[data-value]")?.dataset.value;
  if (value) trigger("select", { index: 0, value });
});
