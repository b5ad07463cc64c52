-- Acknowledge a checkpoint: append its record to the journal and, if it is the latest, make it the hot one.
-- KEYS: hot hash, journal, shard, dirty, namespaces, seen
-- ARGV: record, unchanged channels {channel, version, ...} (framed; '' = the record is complete),
--       changed channels without a value (framed),
--       delta channels {'1' = some have no value here, '1' = the checkpoint has no channels at all, channel, ...: see
--       `advance_history`} (framed; '' = the graph has none),
--       'ttl in ms (0 = none), ttl of the namespaces ("=" = the same), 1 = the checkpoint's format is older than 4,
--       bit of the thread and namespace in `seen`, writer, run lease (nothing = none)', one after the other
-- Returns {sequence number, the previous record's}, or {} when the record must carry every channel.
local MOST_DELTAS, LEAST_DELTA_BYTES = 16, 16384

local hot = KEYS[1]
local record, thread = unframe(ARGV[1]), thread_of(KEYS[2])
local generation, id, parent = record[2], record[4], record[5]
local ttl, namespaces_ttl, is_old, bit, writer, lease = string.match(ARGV[5], '^(%S+) (%S+) (%S+) (%S+) (%S+) (%S*)$')
local state, refusal = enter(KEYS[3], thread, generation, given(lease))
if refusal then return refusal end
local known = redis.call('HMGET', hot, 'g', 'id', 'u', 'wn', 'p', 'l', 'e', 'x', 'q')
if known[1] ~= generation then
  renew(hot, generation, known[1])
  known = {}
end
local current, uncertain = known[2], known[3]

-- d: says that deltas may be made to a channel's value, how many there are, and their bytes; s: holds them.
local has_delta = false
local names = {}
for i = 9, #record, 4 do
  if record[i + 2] ~= '' and record[i + 2] ~= '*' then has_delta = true end
  names[#names + 1] = 'v:' .. record[i]
  names[#names + 1] = 'd:' .. record[i]
end
local removed = unframe(ARGV[3])
for i = 1, #removed do
  names[#names + 1] = 'v:' .. removed[i]
  names[#names + 1] = 'd:' .. removed[i]
end
local held = current and hmget(hot, names) or {}

if ARGV[2] ~= '' or has_delta then
  -- PostgreSQL is sure to have, or to get first, only what the hot parent was built from; and while that is unflushed,
  -- this writer's memory must hold all of it (x, since a complete checkpoint of its own), so that any one process or
  -- Redis can be lost. q: the last record that the hot checkpoint was built from.
  if not current or current ~= parent then return {} end
  if known[8] and known[8] ~= writer then
    local first = state.tail and redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
    if first and tonumber(string.match(first[1], '%d+')) <= tonumber(known[9]) then return {} end
  end
  local unchanged, carried = unframe(ARGV[2]), {}
  for i = 1, #unchanged, 2 do carried[#carried + 1] = 'v:' .. unchanged[i] end
  local versions = hmget(hot, carried)
  for i = 1, #carried do
    if versions[i] ~= unchanged[2 * i] then return {} end
  end
  for i = 9, #record, 4 do
    local base, at = record[i + 2], (i - 9) / 2
    if base ~= '' and base ~= '*' and (held[at + 1] ~= base or not held[at + 2]) then return {} end
  end
end

-- Put a channel's value and its deltas together, and one more. Only the last one is copied whole: until then, values
-- are lists of pieces {bytes, start, length}.
local function fold(key, channel, number, last)
  local names = {'b:' .. channel}
  for i = 1, number do names[i + 1] = 's:' .. channel .. '\0' .. i end
  local parts = hmget(key, names)
  parts[#parts + 1] = last
  local type_length = string.find(last, '\0', 1, true)
  local pieces = {{parts[1], type_length + 1, #parts[1] - type_length}}
  for i = 2, #parts do
    local delta, made = parts[i], {}
    local head, start, first, second_start, second = struct.unpack('>I4I4I4I4I4', delta, type_length + 1)
    local literal = type_length + 33
    local function cut(at, length)
      for _, piece in ipairs(pieces) do
        if length <= 0 then return end
        if at >= piece[3] then
          at = at - piece[3]
        else
          local taken = math.min(piece[3] - at, length)
          made[#made + 1] = {piece[1], piece[2] + at, taken}
          length, at = length - taken, 0
        end
      end
    end
    made[1] = {delta, literal, head}
    cut(start, first)
    made[#made + 1] = {delta, literal + head, #delta - literal - head + 1}
    cut(second_start, second)
    pieces = made
  end
  local out = {string.sub(last, 1, type_length)}
  for i, piece in ipairs(pieces) do out[i + 1] = string.sub(piece[1], piece[2], piece[2] + piece[3] - 1) end
  return table.concat(out)
end

-- Whether a checkpoint may have pending sends among its writes: it has, or it is not the hot one.
local function has_sends(key, hot_id, checkpoint_id)
  if checkpoint_id == '' then return false end
  if hot_id ~= checkpoint_id then return true end
  local values = redis.call('HGETALL', key)
  for i = 1, #values, 2 do
    if string.sub(values[i], 1, 2) == 'w:' and string.find(values[i + 1], '\0__pregel_tasks\0', 1, true) then
      return true
    end
  end
  return false
end

local reply = append(KEYS[2], KEYS[3], KEYS[4], thread, ARGV[1], state)
local fields, stale = {}, {}
local branch = current and current ~= parent
if known[6] then stale[1] = 'l' end
if current and id < current then
  in_chunks('HDEL', hot, stale)
  histories().forget(hot)
  return reply
end
local delta = ARGV[4] ~= '' and unframe(ARGV[4])
local forks_delta = branch and delta and delta[1] == '1'

-- 'u': up to this checkpoint the hot state may be incomplete, or not the latest, and the cold tier must be asked. It
-- stays with the descendants until the hash is warmed.
-- * Nothing was hot: writes that came before their checkpoint may be missing, and a later checkpoint may be cold. Only a
--   thread's first checkpoint is known to be neither, if the shard has never seen the thread and namespace before (its
--   bits are complete once they were filled from the cold tier in this generation).
-- * Another branch was hot: a delta channel's last snapshot, which its descendants name without carrying it, is missing.
-- * Before format 4, a checkpoint's pending sends are writes of its parent, which the library's reader merges.
if not current then
  local mark = early_mark(thread, record[3])
  local early = redis.call('HGET', KEYS[3], mark)
  local seen = redis.call('SETBIT', KEYS[6], bit, 1)
  if not early and (parent ~= '' or seen == 1 or state.seen ~= generation) then early = id end
  if early and early <= id then redis.call('HDEL', KEYS[3], mark) end
  if early and (not uncertain or uncertain < early) then uncertain = early end
elseif not uncertain and (forks_delta or (is_old == '1' and has_sends(hot, current, parent))) then
  uncertain = id
end
if uncertain then fields = {'u', uncertain > id and uncertain or id} end

-- Writes of older checkpoints stay in the cold tier only, except for the history of delta channels; so do the channels
-- of another branch.
local parents_writes = {}
if branch or tonumber(known[4] or '0') > 0 then
  local names, kept = redis.call('HKEYS', hot), 0
  for i = 1, #names do
    local name = names[i]
    local kind = string.sub(name, 1, 2)
    if kind == 'w:' then
      local of = string.sub(name, 3, string.find(name, '\0', 3, true) - 1)
      if of < id then
        stale[#stale + 1] = name
        if delta and of == parent then parents_writes[#parents_writes + 1] = name end
      else
        kept = kept + 1
      end
    elseif branch and (kind == 'v:' or kind == 'b:' or kind == 'd:' or kind == 's:' or kind == 'h:') then
      stale[#stale + 1] = name
    end
  end
  fields[#fields + 1] = 'wn'
  fields[#fields + 1] = kept
end
local seeds = {}
if delta then
  local step = {id = id, parent = parent, current = current, known = not uncertain, given = delta}
  step.writes = parents_writes
  seeds = histories().advance(hot, step, fields, stale)
end
local function drop_deltas(channel, deltas)
  for i = 1, tonumber(string.match(deltas or '0', '^%d+')) do stale[#stale + 1] = 's:' .. channel .. '\0' .. i end
end
for i, channel in ipairs(removed) do
  stale[#stale + 1] = 'v:' .. channel
  if not seeds[channel] then stale[#stale + 1] = 'b:' .. channel end
  local deltas = held[(#record - 8) / 2 + 2 * i]
  if deltas and not seeds[channel] then
    stale[#stale + 1] = 'd:' .. channel
    drop_deltas(channel, deltas)
  end
end

-- A checkpoint that is put again keeps its first parent, as PostgresSaver's upsert does.
if id == current then parent = known[5] end
local count = #fields
for i = 9, #record, 4 do
  local channel, base, value = record[i], record[i + 2], record[i + 3]
  local deltas = held[(i - 9) / 2 + 2]
  fields[count + 1], fields[count + 2] = 'v:' .. channel, record[i + 1]
  count = count + 2
  if base == '' or base == '*' then
    drop_deltas(channel, deltas)
    fields[count + 1], fields[count + 2] = 'b:' .. channel, value
    count = count + 2
    -- Of a checkpoint that is put again, PostgreSQL may keep other bytes under the same versions.
    if base == '*' and id ~= current then
      fields[count + 1], fields[count + 2] = 'd:' .. channel, '0 0'
      count = count + 2
    elseif deltas then
      stale[#stale + 1] = 'd:' .. channel
    end
  else
    local number, bytes = string.match(deltas, '^(%d+) (%d+)$')
    number, bytes = number + 1, bytes + #value
    if number > MOST_DELTAS or bytes > math.max(LEAST_DELTA_BYTES, redis.call('HSTRLEN', hot, 'b:' .. channel)) then
      fields[count + 1], fields[count + 2] = 'b:' .. channel, fold(hot, channel, number - 1, value)
      drop_deltas(channel, deltas)
      number, bytes = 0, 0
    else
      fields[count + 1], fields[count + 2] = 's:' .. channel .. '\0' .. number, value
    end
    fields[count + 3], fields[count + 4] = 'd:' .. channel, string.format('%d %d', number, bytes)
    count = count + 4
  end
end
in_chunks('HDEL', hot, stale)
local head = {'g', generation, 'id', id, 'p', parent, 'c', record[6], 'm', record[7], 'k', record[8], 'x', writer,
              'q', reply[1]}
for i = 1, #head do fields[count + i] = head[i] end
in_chunks('HSET', hot, fields)
if not current then redis.call('SADD', KEYS[5], record[3]) end
keep_alive(hot, KEYS[5], ttl, namespaces_ttl, reply[1], current and known[7])
return reply
