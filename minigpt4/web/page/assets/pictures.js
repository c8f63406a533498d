// The pictures of a conversation: their names, and the window that shows them large.
(() => {
  const { say, button } = window.minigpt4;
  // render.py writes "2/5 dog.jpg".
  const named = (text) => {
    const [, number, count, name] = text.match(/^(\d+)\/(\d+) ?(.*)$/) ?? [];
    if (!number) return "";
    const place = say("picture_of").replace("{number}", number).replace("{count}", count);
    return name ? `${place}: ${name}` : place;
  };
  const name = (picture) => {
    const text = named(picture.alt);
    const button = picture.closest("button");
    if (text) picture.alt = text;
    if (button && picture.alt) button.ariaLabel = `${say("enlarge")}: ${picture.alt}`;
  };
  const all = () => [...document.querySelectorAll("#chat .image-frame img")];

  const show = (clicked) => {
    const dialog = document.createElement("dialog");
    const large = document.createElement("img");
    const caption = document.createElement("p");
    let at = all().indexOf(clicked);
    const turn = (step) => {
      const pictures = all();
      at = (at + step + pictures.length) % pictures.length;
      large.src = pictures[at].src;
      large.alt = caption.textContent = dialog.ariaLabel = pictures[at].alt;
    };
    dialog.id = "lightbox";
    dialog.append(button("close", "close", () => dialog.close()), large, caption);
    if (all().length > 1) {
      dialog.append(button("previous", "left", () => turn(-1)), button("following", "right", () => turn(1)));
    }
    dialog.addEventListener("click", ({ target }) => { if (target === dialog) dialog.close(); });
    dialog.addEventListener("keydown", ({ key }) => {
      if (key === "ArrowLeft") turn(-1);
      if (key === "ArrowRight") turn(1);
    });
    dialog.addEventListener("close", () => dialog.remove()); // the browser gives the focus back
    turn(0);
    document.body.append(dialog);
    dialog.showModal();
  };

  document.addEventListener("click", (event) => {
    const picture = event.target.closest("#chat .image-container > button")?.querySelector("img");
    if (!picture) return;
    event.stopPropagation();
    show(picture);
  }, true);
  new MutationObserver(() => all().forEach(name)).observe(document.documentElement, {
    childList: true, subtree: true, attributeFilter: ["alt"],
  });
})();
