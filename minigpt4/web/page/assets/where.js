// Show where: an object that an answer names is outlined in the pictures while its word is hovered,
// focused or touched. The server finds the objects (looks.py); this finds their words.
(() => {
  const { make } = window.minigpt4;
  // Other words for the detector's classes. Plurals with "s" or "es" are found anyway.
  const OTHERS = {
    person: "people man men woman women boy girl child children kid baby lady player guy",
    bicycle: "bike", motorcycle: "motorbike scooter", airplane: "plane aeroplane aircraft jet",
    boat: "ship sailboat canoe", cat: "kitten", dog: "puppy", cow: "cattle bull", sheep: "lamb",
    handbag: "purse bag", backpack: "rucksack", suitcase: "luggage", skis: "ski", knife: "knives",
    "wine glass": "glass", cup: "mug", donut: "doughnut", couch: "sofa", "potted plant": "plant",
    table: "desk", television: "tv", "computer mouse": "mouse", "remote control": "remote",
    phone: "smartphone cellphone", refrigerator: "fridge", "teddy bear": "teddy", bus: "buses",
  };
  const LABEL = 22; // its height in pixels
  let pictures = []; // of each picture in the chat: [{ name, left, top, right, bottom }, …], as shares
  const images = () => [...document.querySelectorAll("#chat .image-frame img")];

  const finder = (names) => {
    const meaning = new Map();
    for (const name of names) {
      for (const word of [name, ...(OTHERS[name]?.split(" ") ?? [])]) meaning.set(word, name);
    }
    const words = [...meaning.keys()].sort((a, b) => b.length - a.length).join("|");
    return { meaning, pattern: new RegExp(`\\b(${words})(?:s|es)?\\b`, "gi") };
  };

  // --- outlines ------------------------------------------------------------------------------

  // The left, top, width and height of the picture itself within its element's box.
  const drawn = (image) => {
    const { width, height } = image.getBoundingClientRect();
    const { naturalWidth: w, naturalHeight: h } = image;
    const fit = getComputedStyle(image).objectFit === "cover" ? Math.max : Math.min;
    const scale = fit(width / w, height / h);
    return [(width - w * scale) / 2, (height - h * scale) / 2, w * scale, h * scale];
  };
  const outline = (image, objects, label) => {
    const box = image.getBoundingClientRect();
    const [left, top, width, height] = drawn(image);
    const layer = make("div", { className: "where", ariaHidden: "true" });
    Object.assign(layer.style, {
      left: `${box.left}px`, top: `${box.top}px`, width: `${box.width}px`, height: `${box.height}px`,
    });
    for (const object of objects) {
      const frame = make("i", {}, make("b", { textContent: label }));
      Object.assign(frame.style, {
        left: `${left + object.left * width}px`, top: `${top + object.top * height}px`,
        width: `${(object.right - object.left) * width}px`,
        height: `${(object.bottom - object.top) * height}px`,
      });
      frame.classList.toggle("inside", top + object.top * height < LABEL);
      layer.append(frame);
    }
    (image.closest("dialog") ?? document.body).append(layer);
  };
  const hide = () => document.querySelectorAll(".where").forEach((layer) => layer.remove());
  const show = (name, label) => {
    hide();
    images().forEach((image, place) => {
      const objects = pictures[place]?.filter((object) => object.name === name) ?? [];
      if (objects.length && image.complete) outline(image, objects, label);
    });
  };

  // --- words ---------------------------------------------------------------------------------

  const mark = (answer, names) => {
    if (!names.length || answer.querySelector(".seen")) return;
    const { meaning, pattern } = finder(names);
    const marked = new Set();
    const walker = document.createTreeWalker(answer, NodeFilter.SHOW_TEXT);
    const texts = [];
    while (walker.nextNode()) {
      if (!walker.currentNode.parentElement.closest("pre, code, a, .katex, small")) {
        texts.push(walker.currentNode);
      }
    }
    for (let text of texts) {
      for (const found of [...text.data.matchAll(pattern)].reverse()) {
        const word = found[0].toLowerCase();
        if (marked.has(word) || text.parentElement === answer) continue;
        marked.add(word);
        const seen = make("mark", { className: "seen", tabIndex: 0 });
        seen.dataset.name = meaning.get(found[1].toLowerCase());
        text.splitText(found.index + found[0].length);
        const middle = text.splitText(found.index);
        middle.replaceWith(seen);
        seen.append(middle);
      }
    }
  };
  // An object that an answer names may be in any picture above it.
  const update = () => {
    if (!pictures.length || document.documentElement.hasAttribute("data-sending")) return;
    const names = new Set();
    let place = 0;
    for (const row of document.querySelectorAll("#chat .message-row")) {
      for (const _ of row.querySelectorAll(".image-frame img")) {
        for (const { name } of pictures[place] ?? []) names.add(name);
        place += 1;
      }
      const answer = row.matches(".bot-row") && row.querySelector(".md");
      if (answer) mark(answer, [...names]);
    }
  };
  const where = (found) => {
    pictures = found ?? [];
    if (!pictures.length) { // a model without a detector may answer by now
      for (const seen of document.querySelectorAll(".seen")) seen.replaceWith(...seen.childNodes);
    }
    update();
  };
  const over = ({ target }) => {
    const seen = target.closest?.(".seen");
    if (seen) show(seen.dataset.name, seen.textContent);
  };
  for (const type of ["pointerover", "focusin"]) document.addEventListener(type, over);
  // A touched word also scrolls its picture back into view.
  document.addEventListener("click", (event) => {
    const seen = event.target.closest(".seen");
    if (!seen) return;
    const named = images().filter((_, place) => pictures[place]?.some(({ name }) => name === seen.dataset.name));
    const { top, bottom } = document.querySelector("#chat").getBoundingClientRect();
    const inView = (image) => {
      const box = image.getBoundingClientRect();
      return box.bottom > top && box.top < bottom;
    };
    if (!named.some(inView)) named.at(-1)?.scrollIntoView({ block: "center", behavior: "instant" });
    // Two frames later, because scrolling (here, or to reach the word) hides outlines.
    requestAnimationFrame(() => requestAnimationFrame(() => over(event)));
  });
  for (const type of ["pointerout", "focusout"]) {
    document.addEventListener(type, ({ target }) => { if (target.closest?.(".seen")) hide(); });
  }
  document.addEventListener("scroll", hide, { capture: true, passive: true });
  addEventListener("resize", hide);

  // The names of the objects in a picture, for the window that shows it large.
  const objects = (place) => [...new Set(pictures[place]?.map(({ name }) => name))];
  const point = (image, place, name) => {
    hide();
    outline(image, pictures[place].filter((object) => object.name === name), name);
  };
  window.minigpt4.whenRedrawn(update);
  Object.assign(window.minigpt4, { where: { update: where, objects, point, hide } });
})();
