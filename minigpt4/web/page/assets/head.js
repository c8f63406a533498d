// The menu that downloads the conversation.
element.addEventListener("click", (event) => {
  const kind = event.target.closest("[data-value]")?.dataset.value;
  if (kind) trigger("select", { index: 0, value: { kind, about: minigpt4.chats.about() } });
});
