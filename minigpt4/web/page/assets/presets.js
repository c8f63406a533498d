// The presets; "custom" stands among them only while the values are the visitor's own.
const show = () => {
  for (const radio of element.querySelectorAll("input")) radio.checked = radio.value === props.value;
  element.querySelector(".custom").hidden = props.value !== "custom";
};
element.addEventListener("change", (event) => {
  const { value } = event.target;
  if (value !== "custom") {
    props.value = value;
    minigpt4.settle(1);
    trigger("select", { index: 0, value });
  }
  show();
});
watch("value", show);
show();
