// The pictures of a conversation: their names, and the window that shows them large.
(() => {
  const { say, button, make, set, makeDialog, showDialog, where, crop } = window.minigpt4;
  // After the "#" in its address, render.py writes [2, 5, "dog.jpg", "A dog on a beach", "/…/dog.jpg"]:
  // the last is the path of the picture at its full size, if it is known.
  const told = (address) => JSON.parse(decodeURIComponent(address.split("#")[1]));
  const named = (address) => {
    try {
      const [number, count, name, caption] = told(address);
      const place = say("picture_of").replace("{number}", number).replace("{count}", count);
      return [name ? `${place}: ${name}` : place, caption].filter(Boolean).join(". ");
    } catch { return ""; } // no such address
  };
  const name = (picture) => {
    const text = named(picture.src);
    if (!text || picture.alt === text) return;
    picture.alt = text;
    set(picture.closest("button"), { ariaLabel: `${say("enlarge")}: ${text}` });
  };
  // Captions and small copies of the pictures in the message box, by their files' paths on the server.
  // If the browser cannot show a file, it shows a blank tile until the small copy comes.
  let small = {};
  const inBox = () => [...document.querySelectorAll("#box .thumbnail-image")];
  const shows = (picture, path) => path && decodeURI(picture.src).endsWith(path);
  const of = (known, picture) => known[Object.keys(known).find((path) => shows(picture, path) || shows(picture, small[path]))];
  const mend = (picture) => {
    picture.classList.add("blank");
    const path = of(small, picture);
    if (path && !shows(picture, path)) picture.src = `${window.gradio_config.root}/gradio_api/file=${encodeURI(path)}`;
  };
  for (const type of ["error", "load"]) document.addEventListener(type, ({ target }) => {
    if (!target.matches?.("#box .thumbnail-image")) return;
    if (type === "error") mend(target); else target.classList.remove("blank");
  }, true);
  const captions = (told) => {
    if (told?.small) {
      small = told.small;
      inBox().filter(({ className }) => className.includes("blank")).forEach(mend);
    } else for (const picture of inBox()) {
      const text = of(told ?? {}, picture);
      if (text) picture.alt = picture.closest(".thumbnail-wrapper").title = text;
    }
  };
  const all = () => [...document.querySelectorAll("#chat .image-frame img")];

  const show = (clicked) => {
    const dialog = makeDialog("lightbox");
    const [large, caption] = [make("img"), make("p")];
    const objects = make("div", { className: "objects" });
    let at = all().indexOf(clicked);
    const turn = (step) => {
      const pictures = all();
      if (!pictures.length) return; // another conversation is shown by now
      at = (at + step + pictures.length) % pictures.length;
      large.src = pictures[at].src;
      large.alt = caption.textContent = pictures[at].alt;
      set(dialog, { ariaLabel: pictures[at].alt });
      where.hide();
      objects.replaceChildren(...where.objects(at).map((name) => {
        const made = make("button", { type: "button", textContent: name });
        for (const type of ["pointerenter", "focus", "click"]) {
          made.addEventListener(type, () => where.point(large, at, name));
        }
        for (const type of ["pointerleave", "blur"]) made.addEventListener(type, where.hide);
        return made;
      }));
    };
    const cropped = () => {
      const [, , name, , path] = told(large.src);
      const address = path ? `${large.src.split("/file=")[0]}/file=${path}` : large.src;
      where.hide();
      crop(large, { address, name, taken: () => dialog.close() });
    };
    dialog.append(
      button("close", "close", () => dialog.close()), button("crop", "crop", cropped), large, caption, objects,
    );
    if (all().length > 1) {
      dialog.append(button("previous", "left", () => turn(-1)), button("following", "right", () => turn(1)));
    }
    dialog.addEventListener("click", ({ target }) => { if (target === dialog) dialog.close(); });
    dialog.addEventListener("keydown", ({ key }) => {
      if (key === "ArrowLeft") turn(-1);
      if (key === "ArrowRight") turn(1);
    });
    let from = null; // where one finger has come down, on a picture that is not zoomed
    dialog.addEventListener("touchstart", ({ touches }) => {
      from = touches.length === 1 && visualViewport.scale === 1 ? touches[0] : null;
    }, { passive: true });
    dialog.addEventListener("touchend", ({ changedTouches: [to] }) => {
      const across = from ? to.clientX - from.clientX : 0;
      if (Math.abs(across) > Math.max(40, 2 * Math.abs(to.clientY - from?.clientY))) turn(across < 0 ? 1 : -1);
    });
    turn(0);
    showDialog(dialog);
  };

  document.addEventListener("click", (event) => {
    const picture = event.target.closest("#chat .image-container > button")?.querySelector("img");
    if (!picture) return;
    event.stopPropagation();
    show(picture);
  }, true);
  Object.assign(window.minigpt4, { captions });
  new MutationObserver(() => all().forEach(name)).observe(document.documentElement, {
    childList: true, subtree: true, attributeFilter: ["src"],
  });
})();
