/* The relay's inner loop: whole DATA frames between an application's socket and a TLS connection, and the wait for them.
 *
 * A lane keeps no byte from one call to the next. Whatever is not the plain case - an end, an error, a socket that takes
 * no more, any other frame - goes to Python in the list that wait() returns, with every byte and errno already consumed.
 * The pure-Python twin is the same code path without lanes: Relay._app_ready and Link._ready.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <ctype.h>
#include <errno.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include <openssl/err.h>
#include <openssl/ssl.h>

enum {
    HEADER = 4,
    DATA = 4,           /* the frame type, docs/tunnel.md */
    MAX_DATA = 65536,
    RECORD = 16384,     /* one frame fills one TLS record, so the peer reads it whole */
    PAYLOAD = RECORD - HEADER,
    RECORDS = 4,        /* in one write */
    READS = 8,          /* of one lane in one wake-up, so that one bulk stream cannot starve the others */
    PARTS = 64,         /* frames in one write to the application */
    EVENTS = 256,
    FROM_APP = 0, TO_APP = 1,   /* in Lane.moved */
    REQUEST = 0, COUNTS = 1,    /* in Lane.costs, see agent/proxy/latency.py */
};

typedef struct Lane Lane;

typedef struct {
    PyObject_HEAD
    int epoll;
    long long woke_ns;
    uint64_t batch;
    Lane **lanes;       /* by descriptor; not counted: a lane takes itself out before it goes */
    int room;
    int bounds;
    int64_t *bounds_ns;
    struct iovec slots[RECORDS];
    unsigned char buffer[RECORDS * RECORD];
} Engine;

struct Lane {
    PyObject_HEAD
    Engine *engine;
    PyObject *tls;      /* keeps `ssl` alive */
    SSL *ssl;
    int tls_fd;
    int app_fd;         /* -1 while there is no stream, and then the four below are NULL */
    PyObject *relay, *link;
    Py_buffer moved, costs;
    uint64_t handed;    /* in which batch something was handed over: until Python has seen it, we touch nothing more */
    char is_source;
    char app_in, app_out, sends, receives;
};

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Handing over */

/* Python calls to.method(detail) after this batch and before any ordinary event of it. Steals `detail`. */
static int hand(PyObject *todo, Lane *lane, int fd, PyObject *to, const char *method, PyObject *detail)
{
    PyObject *item;

    lane->handed = lane->engine->batch;
    if (!detail || !(item = Py_BuildValue("(iNN)", fd, PyObject_GetAttrString(to, method), detail)))
        return -1;
    int wrong = PyList_Append(todo, item);
    Py_DECREF(item);
    return wrong;
}

static PyObject *bytes(const unsigned char *at, size_t size)
{
    return PyBytes_FromStringAndSize((const char *)at, (Py_ssize_t)size);
}

/* What agent/proxy/link.py says for the same error. NULL: nothing is wrong, OpenSSL only waits. */
static PyObject *why(Lane *lane, int result)
{
    int number = errno;
    char text[200];

    switch (SSL_get_error(lane->ssl, result)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE:
        return NULL;
    case SSL_ERROR_ZERO_RETURN:
        return PyUnicode_FromString("the peer closed the tunnel");
    case SSL_ERROR_SYSCALL:
        return PyUnicode_FromString(number ? strerror(number) : "EOF occurred in violation of protocol");
    }
    const char *reason = ERR_reason_error_string(ERR_peek_last_error());
    snprintf(text, sizeof text, "tls: %s", reason ? reason : "unknown error");
    for (char *c = text + 5; *c; c++)
        *c = *c == ' ' ? '_' : (char)toupper((unsigned char)*c);
    ERR_clear_error();
    return PyUnicode_FromString(text);
}

/* What an exchange cost, as AddedLatency counts it; the clock is read only when the answer is needed. */
static void cost(Lane *lane, int is_request)
{
    Engine *engine = lane->engine;
    int64_t *costs = lane->costs.buf;

    if (is_request != (costs[REQUEST] < 0))
        return;
    int64_t ns = now() - engine->woke_ns;
    if (is_request) {
        costs[REQUEST] = ns;
        return;
    }
    ns += costs[REQUEST];
    int at = 0;
    while (at < engine->bounds && engine->bounds_ns[at] < ns)
        at++;
    costs[COUNTS + at]++;
    costs[REQUEST] = -1;
}

/* The two directions. 0: done, or handed over; -1: a Python exception is set. */

static int from_app(Lane *lane, PyObject *todo)
{
    Engine *engine = lane->engine;
    unsigned char *buffer = engine->buffer;
    ssize_t got = readv(lane->app_fd, engine->slots, RECORDS);
    size_t size = 0;

    if (got < 0)
        return errno == EAGAIN ? 0 : hand(todo, lane, lane->app_fd, lane->relay, "app_lost", PyLong_FromLong(errno));
    if (got == 0)
        return hand(todo, lane, lane->app_fd, lane->relay, "app_ended", PyLong_FromLong(0));
    for (size_t left = (size_t)got; left;) {
        size_t part = left < PAYLOAD ? left : PAYLOAD;
        unsigned char *header = buffer + size;
        header[0] = DATA;
        header[1] = 0;
        header[2] = (unsigned char)(part >> 8);
        header[3] = (unsigned char)part;
        size += HEADER + part;
        left -= part;
    }
    ((int64_t *)lane->moved.buf)[FROM_APP] += got;
    ERR_clear_error();
    errno = 0;
    int wrote = SSL_write(lane->ssl, buffer, (int)size);  /* whole or not at all */
    if (wrote > 0) {
        cost(lane, lane->is_source);
        return 0;
    }
    PyObject *text = why(lane, wrote);
    if (text)
        return hand(todo, lane, lane->tls_fd, lane->link, "close", text);
    if (PyErr_Occurred())
        return -1;
    return hand(todo, lane, lane->tls_fd, lane->relay, "tunnel_full", bytes(buffer, size));
}

/* Payload size of the whole DATA frame that begins here; 0 if something else does. */
static size_t whole_data(const unsigned char *at, size_t size)
{
    if (size <= HEADER || at[0] != DATA)
        return 0;
    size_t payload = (size_t)at[1] << 16 | (size_t)at[2] << 8 | at[3];
    return payload <= MAX_DATA && payload <= size - HEADER ? payload : 0;
}

/* What `parts` hold beyond the first `sent` bytes, as one object. */
static PyObject *unsent(const struct iovec *parts, int number, size_t total, size_t sent)
{
    PyObject *rest = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(total - sent));
    char *to = rest ? PyBytes_AS_STRING(rest) : NULL;

    for (int at = 0; rest && at < number; at++) {
        size_t skip = sent < parts[at].iov_len ? sent : parts[at].iov_len;
        memcpy(to, (char *)parts[at].iov_base + skip, parts[at].iov_len - skip);
        to += parts[at].iov_len - skip;
        sent -= skip;
    }
    return rest;
}

/* 0: all is with the application; 1: Python has to do with it. */
static int to_app(Lane *lane, struct iovec *parts, int number, size_t total, PyObject *todo)
{
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)number};

    ((int64_t *)lane->moved.buf)[TO_APP] += (int64_t)total;
    ssize_t sent = sendmsg(lane->app_fd, &message, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN)
        return hand(todo, lane, lane->app_fd, lane->relay, "app_lost", PyLong_FromLong(errno)) ? -1 : 1;
    cost(lane, !lane->is_source);
    if (sent == (ssize_t)total)
        return 0;
    PyObject *rest = unsent(parts, number, total, sent < 0 ? 0 : (size_t)sent);
    return hand(todo, lane, lane->app_fd, lane->relay, "app_full", rest) ? -1 : 1;
}

/* `size` bytes of the tunnel, from a frame's beginning: the payloads of whole DATA frames in one write. */
static int deliver(Lane *lane, unsigned char *at, size_t size, PyObject *todo)
{
    struct iovec parts[PARTS];

    while (size) {
        size_t payload, total = 0;
        int number = 0;
        while (number < PARTS && (payload = whole_data(at, size))) {
            parts[number++] = (struct iovec){at + HEADER, payload};
            total += payload;
            at += HEADER + payload;
            size -= HEADER + payload;
        }
        int handed = number ? to_app(lane, parts, number, total, todo) : 1;
        if (handed)
            return handed < 0 ? -1 : hand(todo, lane, lane->tls_fd, lane->link, "take", bytes(at, size));
    }
    return 0;
}

/* Read-ahead saves read() calls, but what OpenSSL then holds wakes nobody: it is read until nothing is left, or until
 * what is left is part of a record. */
static int from_tunnel(Lane *lane, PyObject *todo)
{
    unsigned char *buffer = lane->engine->buffer;
    int wrong = 0, reads = 0, got;

    do {
        size_t size = 0;
        do {
            if (reads++ == READS)
                SSL_set_read_ahead(lane->ssl, 0);  /* what OpenSSL holds, and the rest of that record, but no more */
            ERR_clear_error();
            errno = 0;
            got = SSL_read(lane->ssl, buffer + size, RECORD);
            if (got > 0)
                size += (size_t)got;
        } while (got > 0 && size <= sizeof lane->engine->buffer - RECORD && SSL_has_pending(lane->ssl));
        PyObject *text = got > 0 ? NULL : why(lane, got);
        wrong = deliver(lane, buffer, size, todo);
        if (text && !wrong)
            wrong = hand(todo, lane, lane->tls_fd, lane->link, "close", text);
        else
            Py_XDECREF(text);
        if (PyErr_Occurred())
            wrong = -1;
    } while (!wrong && got > 0 && lane->handed != lane->engine->batch &&
             (SSL_has_pending(lane->ssl) || (got == RECORD && reads < READS)));
    if (reads > READS)
        SSL_set_read_ahead(lane->ssl, 1);
    return wrong;
}

/* Lane */

static void lane_end(Lane *lane)
{
    if (lane->app_fd < 0)
        return;
    lane->engine->lanes[lane->app_fd] = lane->engine->lanes[lane->tls_fd] = NULL;
    lane->app_fd = -1;
    PyBuffer_Release(&lane->moved);
    PyBuffer_Release(&lane->costs);
    Py_CLEAR(lane->relay);
    Py_CLEAR(lane->link);
}

static int make_room(Engine *engine, int fd)
{
    if (fd < engine->room)
        return 0;
    int room = fd + 1024;
    Lane **lanes = PyMem_Realloc(engine->lanes, (size_t)room * sizeof *lanes);
    if (!lanes) {
        PyErr_NoMemory();
        return -1;
    }
    memset(lanes + engine->room, 0, (size_t)(room - engine->room) * sizeof *lanes);
    engine->lanes = lanes;
    engine->room = room;
    return 0;
}

static int cells(PyObject *from, Py_buffer *into, int wanted)
{
    if (PyObject_GetBuffer(from, into, PyBUF_WRITABLE))
        return -1;
    if (into->len == wanted * (Py_ssize_t)sizeof(int64_t))
        return 0;
    PyBuffer_Release(into);
    PyErr_SetString(PyExc_ValueError, "a table of another size was expected");
    return -1;
}

static PyObject *Lane_begin(Lane *lane, PyObject *args)
{
    int app_fd, is_source;
    PyObject *relay, *link, *moved, *costs;

    if (!PyArg_ParseTuple(args, "iOOOOp", &app_fd, &relay, &link, &moved, &costs, &is_source))
        return NULL;
    Engine *engine = lane->engine;
    int most = app_fd > lane->tls_fd ? app_fd : lane->tls_fd;
    if (lane->app_fd >= 0 || app_fd < 0 || app_fd == lane->tls_fd || SSL_get_fd(lane->ssl) != lane->tls_fd)
        return PyErr_Format(PyExc_ValueError, "this lane cannot carry descriptor %d", app_fd);
    if (make_room(engine, most))
        return NULL;
    if (engine->lanes[app_fd] || engine->lanes[lane->tls_fd])
        return PyErr_Format(PyExc_ValueError, "another lane has these descriptors");
    if (cells(moved, &lane->moved, 2))
        return NULL;
    if (cells(costs, &lane->costs, COUNTS + engine->bounds + 1)) {
        PyBuffer_Release(&lane->moved);
        return NULL;
    }
    lane->app_fd = app_fd;
    lane->relay = Py_NewRef(relay);
    lane->link = Py_NewRef(link);
    lane->is_source = (char)is_source;
    lane->app_in = lane->app_out = 1;
    lane->sends = lane->receives = 0;
    engine->lanes[app_fd] = engine->lanes[lane->tls_fd] = lane;
    Py_RETURN_NONE;
}

static PyObject *Lane_end(Lane *lane, PyObject *unused)
{
    (void)unused;
    lane_end(lane);
    Py_RETURN_NONE;
}

static PyObject *Lane_waiting(Lane *lane, PyObject *unused)
{
    (void)unused;
    return PyBool_FromLong(SSL_has_pending(lane->ssl));
}

static void Lane_dealloc(Lane *lane)
{
    lane_end(lane);
    Py_XDECREF(lane->tls);
    Py_XDECREF(lane->engine);
    PyObject_Free(lane);
}

static PyMethodDef lane_methods[] = {
    {"begin", (PyCFunction)Lane_begin, METH_VARARGS, NULL},
    {"end", (PyCFunction)Lane_end, METH_NOARGS, NULL},
    {"waiting", (PyCFunction)Lane_waiting, METH_NOARGS, NULL},
    {0},
};

#define FLAG(name) {#name, T_BOOL, offsetof(Lane, name), 0, NULL}
static PyMemberDef lane_members[] = {FLAG(app_in), FLAG(app_out), FLAG(sends), FLAG(receives), {0}};

static PyTypeObject lane_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "agent.proxy._engine.Lane",
    .tp_basicsize = sizeof(Lane),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .tp_dealloc = (destructor)Lane_dealloc,
    .tp_methods = lane_methods,
    .tp_members = lane_members,
};

/* Engine */

/* How CPython 3.11 to 3.13 begin a `_ssl._SSLSocket` (Modules/_ssl.c). Nothing behind `ssl` is used. */
typedef struct {
    PyObject_HEAD
    PyObject *socket;   /* weak reference to the ssl.SSLSocket */
    SSL *ssl;
} PrivateSocket;

/* NULL unless every sign says that this is what we take it for. */
static SSL *inside(PyObject *tls, PyObject *socket, int fd)
{
    PrivateSocket *private = (PrivateSocket *)tls;

    if (strcmp(Py_TYPE(tls)->tp_name, "_ssl._SSLSocket") || Py_TYPE(tls)->tp_basicsize < (int)sizeof *private)
        return NULL;
    if (!private->socket || !PyWeakref_Check(private->socket) || PyWeakref_GetObject(private->socket) != socket)
        return NULL;
    SSL *ssl = private->ssl;
    if (!ssl || SSL_get_app_data(ssl) != (void *)tls || SSL_get_fd(ssl) != fd)
        return NULL;
    /* The same copy of OpenSSL, not another one of the same version: its method tables have one address each. */
    const SSL_METHOD *method = SSL_CTX_get_ssl_method(SSL_get_SSL_CTX(ssl));
    return method == TLS_client_method() || method == TLS_server_method() ? ssl : NULL;
}

static PyObject *Engine_lane(Engine *engine, PyObject *args)
{
    PyObject *socket, *tls;
    int fd;

    if (!PyArg_ParseTuple(args, "OOi", &socket, &tls, &fd))
        return NULL;
    SSL *ssl = fd >= 0 ? inside(tls, socket, fd) : NULL;
    if (!ssl)
        return PyErr_Format(PyExc_ValueError, "the TLS object is not laid out as known");
    Lane *lane = PyObject_New(Lane, &lane_type);
    if (!lane)
        return NULL;
    memset((char *)lane + sizeof(PyObject), 0, sizeof *lane - sizeof(PyObject));
    lane->engine = (Engine *)Py_NewRef(engine);
    lane->tls = Py_NewRef(tls);
    lane->ssl = ssl;
    lane->tls_fd = fd;
    lane->app_fd = -1;
    SSL_set_read_ahead(ssl, 1);
    SSL_set_default_read_buffer_len(ssl, RECORDS * (RECORD + 256));
    return (PyObject *)lane;
}

static PyObject *Engine_forget(Engine *engine, PyObject *arg)
{
    long fd = PyLong_AsLong(arg);
    if (fd == -1 && PyErr_Occurred())
        return NULL;
    if (fd >= 0 && fd < engine->room && engine->lanes[fd])
        lane_end(engine->lanes[fd]);
    Py_RETURN_NONE;
}

/* 1: done or handed over; 0: an ordinary event, for Python; -1: an exception is set. */
static int carry(Engine *engine, const struct epoll_event *event, PyObject *todo)
{
    int fd = event->data.fd;
    Lane *lane = fd < engine->room ? engine->lanes[fd] : NULL;

    if (!lane || lane->handed == engine->batch || !(event->events & EPOLLIN) || event->events & EPOLLOUT)
        return 0;
    int is_app = fd == lane->app_fd;
    if (is_app ? !(lane->app_in && lane->sends) : !(lane->app_out && lane->receives))
        return 0;
    return (is_app ? from_app(lane, todo) : from_tunnel(lane, todo)) ? -1 : 1;
}

/* One batch of events. What is handed over comes first: until Python knows of it, its own steps would be wrong. */
static int batch(Engine *engine, struct epoll_event *events, int number, PyObject *todo)
{
    for (int at = 0; at < number; at++) {
        int carried = carry(engine, &events[at], todo);
        if (carried < 0)
            return -1;
        if (carried)
            events[at].events = 0;
    }
    for (int at = 0; at < number; at++) {
        if (!events[at].events)
            continue;
        PyObject *item = Py_BuildValue("(iOI)", events[at].data.fd, Py_None, events[at].events);
        int wrong = item ? PyList_Append(todo, item) : -1;
        Py_XDECREF(item);
        if (wrong)
            return -1;
    }
    return 0;
}

/* Returns when there is something for Python, or after so many seconds. */
static PyObject *Engine_wait(Engine *engine, PyObject *arg)
{
    struct epoll_event events[EVENTS];
    double seconds = PyFloat_AsDouble(arg);
    if (seconds == -1.0 && PyErr_Occurred())
        return NULL;
    PyObject *todo = PyList_New(0);
    if (!todo)
        return NULL;
    int64_t last = now() + (int64_t)(seconds * 1e9);
    int number;
    engine->woke_ns = last - (int64_t)(seconds * 1e9);
    do {
        int64_t left = last - engine->woke_ns;
        int ms = left > 0 ? (int)((left + 999999) / 1000000) : 0;
        Py_BEGIN_ALLOW_THREADS
        number = epoll_wait(engine->epoll, events, EVENTS, ms);
        Py_END_ALLOW_THREADS
        if (number < 0 && errno != EINTR) {
            PyErr_SetFromErrno(PyExc_OSError);
            goto failed;
        }
        engine->woke_ns = now();
        engine->batch++;
        /* Handlers of signals may end lanes; so before the events are looked at, never while. */
        if (PyErr_CheckSignals() || batch(engine, events, number, todo))
            goto failed;
    } while (number >= 0 && !PyList_GET_SIZE(todo) && engine->woke_ns < last);
    return todo;
failed:
    Py_DECREF(todo);
    return NULL;
}

static PyObject *Engine_new(PyTypeObject *type, PyObject *args, PyObject *names)
{
    int epoll;
    PyObject *bounds;

    (void)names;
    if (!PyArg_ParseTuple(args, "iO!", &epoll, &PyTuple_Type, &bounds))
        return NULL;
    Engine *engine = (Engine *)type->tp_alloc(type, 0);
    if (!engine)
        return NULL;
    engine->epoll = epoll;
    engine->bounds = (int)PyTuple_GET_SIZE(bounds);
    engine->bounds_ns = PyMem_Calloc((size_t)engine->bounds, sizeof *engine->bounds_ns);
    if (!engine->bounds_ns)
        PyErr_NoMemory();
    for (int at = 0; at < engine->bounds && !PyErr_Occurred(); at++)
        engine->bounds_ns[at] = 1000 * PyLong_AsLongLong(PyTuple_GET_ITEM(bounds, at));
    for (int at = 0; at < RECORDS; at++)
        engine->slots[at] = (struct iovec){engine->buffer + at * RECORD + HEADER, PAYLOAD};
    if (PyErr_Occurred())
        Py_CLEAR(engine);
    return (PyObject *)engine;
}

static void Engine_dealloc(Engine *engine)
{
    PyMem_Free(engine->lanes);
    PyMem_Free(engine->bounds_ns);
    Py_TYPE(engine)->tp_free(engine);
}

static PyMethodDef engine_methods[] = {
    {"lane", (PyCFunction)Engine_lane, METH_VARARGS, NULL},
    {"forget", (PyCFunction)Engine_forget, METH_O, NULL},
    {"wait", (PyCFunction)Engine_wait, METH_O, NULL},
    {0},
};

static PyMemberDef engine_members[] = {
    {"woke_ns", T_LONGLONG, offsetof(Engine, woke_ns), READONLY, NULL},
    {0},
};

static PyTypeObject engine_type = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "agent.proxy._engine.Engine",
    .tp_basicsize = sizeof(Engine),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = Engine_new,
    .tp_dealloc = (destructor)Engine_dealloc,
    .tp_methods = engine_methods,
    .tp_members = engine_members,
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "agent.proxy._engine", .m_size = -1};

PyMODINIT_FUNC PyInit__engine(void)
{
    if (PyType_Ready(&lane_type) || PyType_Ready(&engine_type))
        return NULL;
    PyObject *made = PyModule_Create(&module);
    if (made && (PyModule_AddObjectRef(made, "Engine", (PyObject *)&engine_type) ||
                 PyModule_AddObjectRef(made, "Lane", (PyObject *)&lane_type) ||
                 PyModule_AddStringConstant(made, "OPENSSL", OpenSSL_version(OPENSSL_VERSION))))
        Py_CLEAR(made);
    return made;
}
