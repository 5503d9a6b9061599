// Drafts under the gallery: Ctrl + click marks them, and the button finishes the marked ones, or the selected one. Each
// goes through the WebUI's own upscale button, which replaces it in the gallery. From the last to the first, because a
// setting of the WebUI inserts the new image behind the old one.

const mrflowDrafts = {
    marked: new Set(),
    shown: "",
    busy: false,
    stopped: false,
    nothing: "Select a draft under the gallery first, or mark several with Ctrl + click.",

    gallery() {
        return gradioApp().querySelector("#txt2img_gallery");
    },

    thumbnails(size) {
        return Array.from(mrflowDrafts.gallery()?.querySelectorAll(`.thumbnail-item.thumbnail-${size}`) ?? []);
    },

    information() {
        return gradioApp().querySelector("#generation_info_txt2img textarea")?.value ?? "";
    },

    // Indices of the drafts among the gallery's images, by their metadata.
    drafts() {
        try {
            const told = JSON.parse(mrflowDrafts.information());
            const first = told.index_of_first_image ?? 0;
            return new Set(
                told.infotexts.flatMap((info, at) => (at >= first && info?.includes("MrFlow draft: ") ? [at] : [])),
            );
        } catch {
            return new Set();
        }
    },

    selected() {
        return mrflowDrafts.thumbnails("small").findIndex((item) => item.classList.contains("selected"));
    },

    images() {
        return mrflowDrafts.thumbnails("small").map((item) => item.querySelector("img")?.src).join();
    },

    say(text) {
        const said = typeof getTranslation === "function" ? getTranslation(text) : undefined;
        alert(`MrFlow: ${said ?? text}`);
    },

    click(event) {
        if (event.target.closest("#txt2img_interrupt, #txt2img_interrupting, #txt2img_skip")) mrflowDrafts.stopped = true;
        if (event.target.closest("#mrflow_finish")) {
            mrflowDrafts.finish();
            return;
        }
        const item = event.target.closest("#txt2img_gallery .thumbnail-item");
        if (!item || !(event.ctrlKey || event.metaKey)) return;
        const size = item.classList.contains("thumbnail-small") ? "small" : "lg";
        const at = mrflowDrafts.thumbnails(size).indexOf(item);
        if (!mrflowDrafts.drafts().has(at)) return;
        event.preventDefault();
        event.stopPropagation();
        if (!mrflowDrafts.marked.delete(at)) mrflowDrafts.marked.add(at);
        mrflowDrafts.paint();
    },

    paint() {
        for (const size of ["small", "lg"]) {
            mrflowDrafts.thumbnails(size).forEach((item, at) => {
                item.toggleAttribute("data-mrflow-marked", mrflowDrafts.marked.has(at));
            });
        }
    },

    // Another job's images: nothing of them is marked yet.
    changed() {
        const text = mrflowDrafts.information();
        if (text !== mrflowDrafts.shown) {
            if (!mrflowDrafts.busy) mrflowDrafts.marked.clear();
            mrflow.ask(); // this machine's seconds may be known now
        }
        mrflowDrafts.shown = text;
        mrflowDrafts.paint();
    },

    async until(test, tries) {
        for (let left = tries; left > 0; left--) {
            if (test()) return true;
            await new Promise((done) => setTimeout(done, 200));
        }
        return false;
    },

    running() {
        return gradioApp().querySelector("#txt2img_interrupt")?.style.display === "block";
    },

    // The gallery may still put its own selection back after a job, so the choice has to stay for a while.
    async select(at) {
        for (let tries = 5; tries > 0; tries--) {
            if (mrflowDrafts.selected() !== at) {
                const small = mrflowDrafts.thumbnails("small");
                (small.length ? small : mrflowDrafts.thumbnails("lg"))[at]?.click();
            }
            await mrflowDrafts.until(() => mrflowDrafts.selected() === at, 10);
            if (!(await mrflowDrafts.until(() => mrflowDrafts.selected() !== at, 4))) return true;
        }
        return false;
    },

    // Through the WebUI's own button; whether the image was replaced.
    async finishOne(at) {
        if (!(await mrflowDrafts.select(at)) || !mrflowDrafts.drafts().has(at)) return false;
        const [before, images] = [mrflowDrafts.information(), mrflowDrafts.images()];
        gradioApp().querySelector("#txt2img_upscale")?.click();
        await mrflowDrafts.until(() => mrflowDrafts.running() || mrflowDrafts.information() !== before, 50);
        await mrflowDrafts.until(() => !mrflowDrafts.running(), Infinity);
        await mrflowDrafts.until(() => mrflowDrafts.information() !== before, 25);
        if (mrflowDrafts.information() === before) return false; // it failed, or was refused
        await mrflowDrafts.until(() => mrflowDrafts.images() !== images, 25);
        return !mrflowDrafts.stopped;
    },

    async finish() {
        if (mrflowDrafts.busy || mrflowDrafts.running()) return;
        const drafts = mrflowDrafts.drafts();
        const chosen = mrflowDrafts.marked.size ? [...mrflowDrafts.marked] : [mrflowDrafts.selected()];
        const picks = chosen.filter((at) => drafts.has(at)).sort((one, other) => other - one);
        if (picks.length === 0 && drafts.size === 1) picks.push(...drafts);
        if (picks.length === 0) mrflowDrafts.say(mrflowDrafts.nothing);
        const box = gradioApp().querySelector("#script_mrflow_enabled-visible-checkbox");
        if (picks.length && box && !box.checked) box.click();
        mrflowDrafts.busy = true;
        mrflowDrafts.stopped = false;
        try {
            for (const at of picks) {
                if (!(await mrflowDrafts.finishOne(at))) return;
                mrflowDrafts.marked.delete(at);
                mrflowDrafts.paint();
            }
        } finally {
            mrflowDrafts.busy = false;
        }
    },

    start() {
        document.addEventListener("click", mrflowDrafts.click, true);
        const gallery = mrflowDrafts.gallery();
        if (gallery) new MutationObserver(mrflowDrafts.changed).observe(gallery, {childList: true, subtree: true});
    },
};

onUiLoaded(mrflowDrafts.start);
