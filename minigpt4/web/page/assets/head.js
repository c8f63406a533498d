// The menu that downloads the conversation; where there are several models, their selector.
element.addEventListener("click", (event) => {
  const kind = event.target.closest("[data-value]")?.dataset.value;
  if (kind) trigger("select", { index: 0, value: { kind, about: minigpt4.chats.about() } });
});
element.addEventListener("change", ({ target }) => {
  minigpt4.settings.keep("model", target.value);
  minigpt4.settle(1);
  trigger("input", { value: { model: target.value, when: performance.now() } });
});
// An option that was once chosen by hand no longer follows its attribute.
watch("value", () => {
  const option = element.querySelector("option[selected]");
  if (option) option.selected = true;
});
