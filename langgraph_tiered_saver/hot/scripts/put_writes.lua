-- Acknowledge writes: append their record to the journal and, unless their checkpoint is an older one, keep them hot.
-- KEYS: hot hash, journal, shard, dirty, namespaces
-- ARGV: record, 'ttl in ms (0 = none), ttl of the namespaces ("=" = the same), run lease (nothing = none)'
-- Returns {sequence number, the previous record's}.
local hot = KEYS[1]
local record, thread = unframe(ARGV[1]), thread_of(KEYS[2])
local generation, id = record[2], record[4]
local ttl, namespaces_ttl, lease = string.match(ARGV[2], '^(%S+) (%S+) (%S*)$')
local state, refusal = enter(KEYS[3], thread, generation, given(lease))
if refusal then return refusal end
local known = redis.call('HMGET', hot, 'g', 'id', 'u', 'l', 'e')
if known[1] ~= generation then
  renew(hot, generation, known[1])
  known = {}
end
local current = known[2]
local reply = append(KEYS[2], KEYS[3], KEYS[4], thread, ARGV[1], state)
if known[4] then redis.call('HDEL', hot, 'l') end
if current and id < current then
  local channels = {}
  for i = 9, #record, 3 do channels[record[i]] = true end
  histories().forget(hot, channels)
  return reply
end
if not current then
  -- Earlier writes of the same checkpoint may have left the hot tier; whoever reads it must ask the cold one.
  -- The shard keeps that in mind too, because the hash may be evicted before the checkpoint comes.
  if not known[3] or known[3] < id then
    redis.call('HSET', hot, 'g', generation, 'u', id)
    redis.call('HSET', KEYS[3], early_mark(thread, record[3]), id)
  end
  redis.call('SADD', KEYS[5], record[3])
else
  local command = record[7] == '1' and 'HSET' or 'HSETNX'
  local stem = 'w:' .. id .. '\0' .. record[5] .. '\0'
  local added = 0
  for i = 8, #record, 3 do
    local value = record[6] .. '\0' .. record[i + 1] .. '\0' .. record[i + 2]
    added = added + redis.call(command, hot, stem .. record[i], value)
  end
  if added > 0 then redis.call('HINCRBY', hot, 'wn', added) end
end
keep_alive(hot, KEYS[5], ttl, namespaces_ttl, reply[1], current and known[5])
return reply
