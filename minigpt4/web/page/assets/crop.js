// Crop: a part of a picture goes into the message box as a picture of its own.
(() => {
  const { say, button, make, set, makeDialog, showDialog, attach } = window.minigpt4;
  const LEAST = 0.05; // smallest width and height of the frame, as shares of the picture's
  const STEP = 0.02; // how far an arrow key moves it, as a share
  const MOST_PIXELS = 16e6; // some phones' canvases hold no more
  const KEYS = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };
  const within = (value, least, most) => Math.min(Math.max(value, least), most);

  // The frame between two corners, each [x, y].
  const between = ([x, y], [toX, toY]) => {
    const width = Math.max(Math.abs(toX - x), LEAST), height = Math.max(Math.abs(toY - y), LEAST);
    return {
      x: within(Math.min(x, toX), 0, 1 - width), y: within(Math.min(y, toY), 0, 1 - height), width, height,
    };
  };
  const moved = (frame, [right, down]) => ({
    ...frame, x: within(frame.x + right, 0, 1 - frame.width), y: within(frame.y + down, 0, 1 - frame.height),
  });
  const resized = (frame, [right, down]) => ({
    ...frame,
    width: within(frame.width + right, LEAST, 1 - frame.x),
    height: within(frame.height + down, LEAST, 1 - frame.y),
  });

  const loaded = async (address) => {
    const image = Object.assign(new Image(), { src: address });
    await image.decode();
    return image;
  };
  const cut = (image, { x, y, width, height }) => {
    const [w, h] = [image.naturalWidth, image.naturalHeight];
    const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (width * w * height * h)));
    const canvas = make("canvas", {
      width: Math.max(1, Math.round(width * w * scale)), height: Math.max(1, Math.round(height * h * scale)),
    });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "#fff"; // behind transparent parts, as on the server
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, x * w, y * h, width * w, height * h, 0, 0, canvas.width, canvas.height);
    return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.95));
  };

  // shown: the picture's <img>; address: the picture at its full size, if it is known; name: of its
  // file; taken: is called once there is a crop.
  const crop = async (shown, { address = shown.src, name = "", taken = () => {} } = {}) => {
    const { src } = shown;
    if (!shown.complete) await shown.decode().catch(() => {}); // it is still being loaded
    // There was a second click meanwhile, or another picture is shown.
    if (document.getElementById("crop") || shown.src !== src) return;
    if (!shown.naturalWidth) { // a format that this browser does not show
      window.minigpt4.notice(say("no_crop"));
      return;
    }
    const whole = loaded(address).catch(() => shown); // the server deletes files after a day
    const dialog = makeDialog("crop", say("crop_title"));
    const stage = make("div", { className: "stage" });
    const region = make("div", { className: "region", tabIndex: 0, role: "application", ariaLabel: say("crop_frame") });
    const hint = make("p", { id: "crop-hint", textContent: `${say("crop_hint")} ` });
    const told = make("p", { role: "status", className: "heard" });
    const use = make("button", { type: "button", className: "use", textContent: say("crop_use") });
    let frame = { x: 0.25, y: 0.25, width: 0.5, height: 0.5 };

    const show = (next) => {
      frame = next;
      const percent = Object.entries(frame).map(([key, share]) => [key, Math.round(share * 100)]);
      told.textContent = percent.reduce((text, [key, value]) => text.replace(`{${key}}`, value), say("crop_place"));
      Object.assign(region.style, {
        left: `${frame.x * 100}%`, top: `${frame.y * 100}%`,
        width: `${frame.width * 100}%`, height: `${frame.height * 100}%`,
      });
      const [left, top] = [frame.x * 100, frame.y * 100];
      const [right, bottom] = [left + frame.width * 100, top + frame.height * 100];
      const inside = [[left, top], [left, bottom], [right, bottom], [right, top], [left, top]];
      const around = [[0, 0], [0, 100], [100, 100], [100, 0], [0, 0], ...inside];
      const path = around.map(([x, y]) => `${x}% ${y}%`).join(", ");
      stage.style.setProperty("--around", `polygon(evenodd, ${path})`);
    };
    const take = async () => {
      use.disabled = true;
      const blob = await cut(await whole, frame);
      if (!dialog.open) return; // it was cancelled meanwhile
      dialog.close();
      taken();
      const stem = name.replace(/\.\w+$/, "") || "picture";
      attach([new File([blob], `${stem}-crop.jpg`, { type: "image/jpeg" })]);
    };

    // Dragging a corner leaves the opposite one in place; dragging inside moves the frame; dragging
    // outside begins a new one.
    let drag = null;
    const at = ({ clientX, clientY }) => {
      const box = stage.getBoundingClientRect();
      return [within((clientX - box.left) / box.width, 0, 1), within((clientY - box.top) / box.height, 0, 1)];
    };
    const started = (event) => {
      if (event.button) return;
      const { x, y, width, height } = frame;
      const corner = event.target.dataset.corner;
      let anchor = at(event);
      if (corner) anchor = [corner.includes("left") ? x + width : x, corner.includes("top") ? y + height : y];
      drag = { anchor: event.target === region ? null : anchor, frame, from: at(event), event };
      stage.setPointerCapture(event.pointerId);
      event.preventDefault();
      region.focus();
    };
    const dragged = (event) => {
      if (!drag || event.pointerId !== drag.event.pointerId) return;
      const far = Math.hypot(event.clientX - drag.event.clientX, event.clientY - drag.event.clientY);
      if (!drag.far && far < 4) return; // a click
      drag.far = true;
      const [x, y] = at(event);
      show(drag.anchor ? between(drag.anchor, [x, y]) : moved(drag.frame, [x - drag.from[0], y - drag.from[1]]));
    };
    stage.addEventListener("pointerdown", started);
    stage.addEventListener("pointermove", dragged);
    for (const type of ["pointerup", "pointercancel"]) stage.addEventListener(type, () => { drag = null; });
    region.addEventListener("keydown", (event) => {
      const by = KEYS[event.key];
      if (by) show((event.shiftKey ? resized : moved)(frame, by));
      else if (event.key === "Enter") take();
      else return;
      event.preventDefault();
    });
    use.addEventListener("click", take);

    hint.append(make("span", { className: "keys", textContent: say("crop_keys") }));
    region.setAttribute("aria-describedby", hint.id);
    for (const corner of ["left top", "right top", "left bottom", "right bottom"]) {
      const handle = make("i");
      handle.dataset.corner = corner;
      region.append(handle);
    }
    stage.style.setProperty("--ratio", shown.naturalWidth / shown.naturalHeight);
    stage.append(make("img", { src: shown.src, alt: shown.alt, draggable: false }), region);
    dialog.append(button("close", "close", () => dialog.close()), stage, hint, told, use);
    show(frame);
    showDialog(dialog);
    region.focus();
  };

  // Each thumbnail in the message box gets a button that crops it.
  window.minigpt4.whenRedrawn(() => {
    for (const thumbnail of document.querySelectorAll("#box .thumbnail-item:has(> img):not(:has(> .crop))")) {
      const image = thumbnail.querySelector("img");
      const name = () => decodeURIComponent(image.src.split("/").at(-1));
      const made = button("crop", "crop", () => crop(image, { name: name() }));
      set(made, { ariaLabel: `${say("crop")}: ${name()}` });
      made.classList.add("crop");
      image.after(made);
    }
  });
  Object.assign(window.minigpt4, { crop });
})();
