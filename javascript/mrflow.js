// MrFlow's page helper. The plan line is made by Python from the values on the page; what the page cannot see (a
// checkpoint that was loaded meanwhile, sizes that a preset of the WebUI wrote before the page listened) is asked for
// here: once when the page is ready, and whenever the pointer comes to the accordion.

const mrflow = {
    pause: 1500,
    asked: 0,

    element(name) {
        return gradioApp().querySelector(`#script_mrflow_${name}`);
    },

    refresh() {
        const button = mrflow.element("refresh");
        if (button && Date.now() - mrflow.asked > mrflow.pause) {
            mrflow.asked = Date.now();
            button.click();
        }
    },

    start() {
        const accordion = mrflow.element("enabled");
        if (!accordion) return;
        accordion.addEventListener("pointerenter", mrflow.refresh);
        accordion.addEventListener("focusin", mrflow.refresh);
        mrflow.refresh();
    },
};

onUiLoaded(mrflow.start);
