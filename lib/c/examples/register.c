/* A buffer is registered in a protection domain that the program has: key, path and reasons in one call.

   libibverbs is opened here, so that this compiles without its header; a program that has queue pairs includes
   infiniband/verbs.h, links libibverbs, and gives the ibv_pd that it has. */
#include <dlfcn.h>
#include <peerbuf.h>
#include <stdio.h>
#include <stdlib.h>

static void must(peerbuf_code code) {
    const peerbuf_error *error = peerbuf_last_error();
    if (code == PEERBUF_CODE_OK) return;
    fprintf(stderr, "%s\n  evidence: %s\n  remedy: %s\n", error->message, error->evidence, error->remedy);
    exit(1);
}

int main(void) {
    void *verbs = dlopen("libibverbs.so.1", RTLD_NOW);
    if (!verbs) return fprintf(stderr, "%s\n", dlerror()), 77;
    void **(*get_device_list)(int *) = (void **(*)(int *))dlsym(verbs, "ibv_get_device_list");
    void *(*open_device)(void *) = (void *(*)(void *))dlsym(verbs, "ibv_open_device");
    void *(*alloc_pd)(void *) = (void *(*)(void *))dlsym(verbs, "ibv_alloc_pd");
    int (*dealloc_pd)(void *) = (int (*)(void *))dlsym(verbs, "ibv_dealloc_pd");
    int (*close_device)(void *) = (int (*)(void *))dlsym(verbs, "ibv_close_device");
    int count = 0;
    void **list = get_device_list(&count);
    if (count == 0) return fprintf(stderr, "no RDMA card\n"), 77;
    void *context = open_device(list[0]);
    void *pd = context ? alloc_pd(context) : NULL;
    if (!pd) return perror(""), 1;

    peerbuf_domain *domain;
    peerbuf_buffer *buffer;
    peerbuf_registration *registration;
    peerbuf_registration_info info;
    peerbuf_report *report;
    peerbuf_report_info path;
    must(peerbuf_domain_from_pd(pd, &domain));
    peerbuf_code code = peerbuf_export_udmabuf("registered", 1 << 20, &buffer);
    if (code == PEERBUF_CODE_UNAVAILABLE) code = peerbuf_export_memfd("registered", 1 << 20, &buffer);
    must(code);
    must(peerbuf_register(domain, buffer, 4096, PEERBUF_ANY, PEERBUF_READ_WRITE, &registration, &report));
    must(peerbuf_registration_get(registration, &info));
    must(peerbuf_report_get(report, &path));
    printf("%llu bytes at %#llx, lkey %#x, rkey %#x, %s: %s\n  %s\n", (unsigned long long)info.length,
           (unsigned long long)info.address, info.lkey, info.rkey, info.rung, path.path_name, path.json);

    /* Before the domain: what is registered in it. */
    must(peerbuf_registration_free(registration));
    must(peerbuf_domain_free(domain));
    return dealloc_pd(pd) || close_device(context);
}
